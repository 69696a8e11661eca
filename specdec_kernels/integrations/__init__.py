"""The operators inside the stacks that people run. One module a stack, which is imported when it is used."""
