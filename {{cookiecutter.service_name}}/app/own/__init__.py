"""Yours: code of your own that the service needs beside the contract. A template update never touches it."""
