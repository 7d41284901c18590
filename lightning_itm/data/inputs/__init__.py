"""What a set is given: images in any form, and texts of any length, as they are looked at before they are used."""
