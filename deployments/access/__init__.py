"""Access control: API keys, rates and quotas."""
