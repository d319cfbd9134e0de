"""Which variant at which call? The search for strategies, by cost and a metric that are both measured."""
