"""The guided tour: synthetic scenes, a tiny trained EDJE model, and the page that shows both."""
