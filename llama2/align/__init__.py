"""Alignment in miniature: every stage of making Llama 2-Chat, on tasks with known answers.

Source of the stages: Touvron et al. 2023, arXiv:2307.09288, sections 3 and 4.
"""
