"""Files by others: read without running what is in them, and whose keys are which of ours."""
