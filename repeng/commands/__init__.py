"""The work of the commands: one module per command. They import everything, so `repeng.cli` imports them late."""
