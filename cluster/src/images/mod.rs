//! Images and guest kernels: uploads, their import, and the content that the agent is given.
//!
//! Content is first kept in this node's store and then made known by a command, so a name never points to nothing. Content
//! that no record needs any more is swept afterwards; imports and sweeps exclude each other.

pub mod blobs;
pub mod import;
mod kernel;
pub mod upload;

pub use import::{FREE_BYTES_MIN, ImportFailure, Importer};
