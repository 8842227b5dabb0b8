"""A CTC speech trainer, whose models, recipes and reports are here."""
