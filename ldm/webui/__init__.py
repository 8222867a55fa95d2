"""The page: a form in the browser over the service's engine, its controls made from ImageRequest's fields."""
