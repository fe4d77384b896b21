//! Who is who between nodes: the cluster's certificate authority, a node's identity, TLS with both.
//!
//! * [`authority`]: makes the authority, signs certificates of nodes
//! * [`identity`]: the folder with this node's key and certificate
//! * [`tls`]: connections between nodes and from users, by present keys
//! * [`keeper`]: renews certificates, follows a change of the authority
//! * [`access`]: who may use the API over TLS
//!
//! The authority's key is part of the replicated state, so that any node can let another one join and can renew its own
//! certificate while others are away. It never leaves the state folder and the connections between nodes.

pub mod access;
pub mod authority;
pub mod identity;
pub mod keeper;
pub mod tls;

#[cfg(test)]
mod rotation_model_test;

use std::fmt::Write;
use std::path::PathBuf;

use sha2::{Digest, Sha256};

/// What can go wrong with keys and certificates.
#[derive(Debug, thiserror::Error)]
pub enum AuthError {
    /// A key or certificate cannot be made.
    #[error("cannot make a certificate")]
    Make(#[from] rcgen::Error),
    /// A key or certificate cannot be used.
    #[error("cannot use the certificate")]
    Use(#[from] rustls::Error),
    /// The verifier of certificates cannot be made.
    #[error("cannot verify with these authorities")]
    Verifier(#[from] rustls::client::VerifierBuilderError),
    /// A certificate cannot be read.
    #[error("not a certificate of this cluster: {0}")]
    Foreign(String),
    /// A file of the identity cannot be read or written.
    #[error("cannot use {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: std::io::Error,
    },
    /// A file of the identity has another form.
    #[error("{path} is damaged: {reason}")]
    Damaged {
        /// Which.
        path: PathBuf,
        /// How.
        reason: String,
    },
    /// The system has no random numbers.
    #[error("no random numbers")]
    Random,
}

/// SHA-256 of bytes in hexadecimal.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a string cannot fail.
        write!(text, "{byte:02x}").ok();
        text
    })
}

/// 32 random bytes in hexadecimal.
///
/// # Errors
/// [`AuthError::Random`].
pub fn random_hex() -> Result<String, AuthError> {
    let mut bytes = [0; 32];
    let random = rustls::crypto::ring::default_provider().secure_random;
    random.fill(&mut bytes).map_err(|_| AuthError::Random)?;
    Ok(hex(&bytes))
}
