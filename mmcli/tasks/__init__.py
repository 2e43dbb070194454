"""What the user asks for: the columns of a Result and how model outputs become them."""
