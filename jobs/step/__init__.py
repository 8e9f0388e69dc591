"""What one optimizer step computes: engine, gradients with the same bits at any world size, what ranks agree on."""
