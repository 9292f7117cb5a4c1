"""Before a run: settings from images and machine, speed, memory, a look at the data."""
