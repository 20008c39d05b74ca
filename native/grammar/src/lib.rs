//! Nothing of our own: the C functions of llguidance, which grammar.cc calls.
pub use llguidance::ffi::*;
