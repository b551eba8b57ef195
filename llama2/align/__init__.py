"""Alignment in miniature: every stage of Llama 2-Chat's making, on tasks of known answers.

Source of the stages: Touvron et al. 2023, arXiv:2307.09288, sections 3 and 4.
"""
