"""The commands of the trainer; the files of these names in fastguard/ start them."""
