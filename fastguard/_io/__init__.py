"""How fastguard reads and writes files, and what it shows on terminals and in logs."""
