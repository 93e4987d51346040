"""Names of the tasks; imports nothing, so that the configuration can name them."""

# The name of a task is that of its module in this package; its class is the name in camel case.
TASKS = ("language_model", "text_classification", "translation", "question_answering")
