"""The parts of structured channel removal: choosing, shrinking weights, rewriting sizes, proof."""
