"""Makes generations: data sets, backbones, constraints, the training loop and its launch on Ray Train."""
