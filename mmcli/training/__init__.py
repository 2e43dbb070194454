"""Fine-tuning: data, objectives, the loop."""
