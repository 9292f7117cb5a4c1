"""What the user sees: terminal, loggers, log, sheets of images, the machine a run was made on."""
