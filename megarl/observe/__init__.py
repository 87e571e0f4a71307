"""What a run tells people: timers, metrics files, the console, the report at the end."""
