"""The contract: requests, responses, problems, and the signature that artifacts must carry."""
