"""What a case would need and how fast it would be, which way is best, and the code that loads it; torch is never imported."""
