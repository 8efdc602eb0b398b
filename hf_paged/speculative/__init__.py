"""Speculative decoding: drafters propose tokens, the target model's next step verifies them."""
