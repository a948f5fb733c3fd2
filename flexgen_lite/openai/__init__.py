"""Bodies of requests and responses in the OpenAI API's form."""
