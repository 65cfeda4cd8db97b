"""Results in other forms: Markdown, JSON, CSV, badges, summaries."""
