"""What a person reads: the plan, the report and its plots, TensorBoard and the model card."""
