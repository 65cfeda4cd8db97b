"""What is private: by its look, whoever's it is, and which words are no secret because they are ours."""
