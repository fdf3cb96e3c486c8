"""From records to what a report shows: summaries, curves, measures and their statistics."""
