"""Who carries a question? torch.distributed, or N workers stepped in one process; a ledger counts for any of
them."""
