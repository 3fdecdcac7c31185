"""When the stages run, and who sees it: Prefect, the servers, the command line."""
