"""What the LLM is asked, a file per task: prompt, target, and at which events it can be asked."""
