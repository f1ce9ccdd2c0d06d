"""What a command does once its options are checked: imported by the command, when it runs."""
