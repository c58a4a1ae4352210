"""Page store and policies of the context; knows no model and no position maths."""
