"""What a model is: its sites, its minibatches, its batches."""
