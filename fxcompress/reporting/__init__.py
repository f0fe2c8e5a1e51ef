"""What every step rewrote, skipped and cost: on the console, as JSON and as one HTML page."""
