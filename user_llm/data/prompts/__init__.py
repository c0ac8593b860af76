"""What the LLM is asked, one file for each task: the prompt, the target, and at which events the task can be asked."""
