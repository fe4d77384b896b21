//! Virtual machine monitor: one process, one microVM.
