//! The folder with this node's identity: which node of which cluster it is, its key, its certificate, whom it trusts.
//!
//! | file | what |
//! |---|---|
//! | `node.json` | [`Identity`]; written last, so it exists only beside the others |
//! | `node.key` | the Ed25519 key, PKCS#8, mode 0600 |
//! | `node.crt` | its certificate |
//! | `authorities.crt` | the authorities that are trusted |

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rcgen::{KeyPair, PKCS_ED25519, PublicKeyData};
use serde::{Deserialize, Serialize};

use super::{AuthError, hex};
use crate::state::NodeId;

/// Largest file of an identity in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Which node this is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The cluster.
    pub cluster: String,
    /// Number of this node in it.
    pub node: NodeId,
    /// Where other nodes and users reach this node.
    pub address: SocketAddr,
    /// Where it listens for them.
    pub bind: SocketAddr,
    /// Version of the trust that certificate and authorities are from, at least; 0 when nobody said.
    #[serde(default)]
    pub trust_version: u64,
}

/// An identity with its key and certificates.
#[derive(Clone)]
pub struct Keys {
    /// Which node.
    pub identity: Identity,
    /// Its key, PEM.
    pub key_pem: String,
    /// Its certificate, PEM.
    pub certificate_pem: String,
    /// Trusted authorities, PEM.
    pub authorities_pem: String,
}

/// A new key (PEM), and its public half in hexadecimal.
///
/// # Errors
/// See [`AuthError`].
pub fn new_key() -> Result<(String, String), AuthError> {
    let key = KeyPair::generate_for(&PKCS_ED25519)?;
    let public = hex(key.der_bytes());
    Ok((key.serialize_pem(), public))
}

/// The public half of a key in hexadecimal.
///
/// # Errors
/// See [`AuthError`].
pub fn public_key(key_pem: &str) -> Result<String, AuthError> {
    Ok(hex(KeyPair::from_pem(key_pem)?.der_bytes()))
}

fn folder(state: &Path) -> PathBuf {
    state.join("identity")
}

fn next_folder(state: &Path) -> PathBuf {
    state.join("identity.next")
}

impl Keys {
    /// What is in the state folder, when there is something.
    ///
    /// # Errors
    /// See [`AuthError`].
    pub fn load(state: &Path) -> Result<Option<Self>, AuthError> {
        let folder = folder(state);
        let path = folder.join("node.json");
        if !path.exists() {
            return Ok(None);
        }
        let identity = serde_json::from_str(&read(&path)?)
            .map_err(|error| AuthError::Damaged { path, reason: error.to_string() })?;
        Ok(Some(Self {
            identity,
            key_pem: read(&folder.join("node.key"))?,
            certificate_pem: read(&folder.join("node.crt"))?,
            authorities_pem: read(&folder.join("authorities.crt"))?,
        }))
    }

    /// Stores it. Each file is replaced whole, `node.json` last.
    ///
    /// # Errors
    /// See [`AuthError`].
    pub fn store(&self, state: &Path) -> Result<(), AuthError> {
        self.store_in(folder(state))
    }

    /// Stores it as the identity of the next start, at which this node leaves its present cluster.
    ///
    /// # Errors
    /// See [`AuthError`].
    pub fn store_next(&self, state: &Path) -> Result<(), AuthError> {
        self.store_in(next_folder(state))
    }

    /// Takes on the identity of the next start, if there is one. `leave` forgets what belongs to the present cluster; a crash
    /// in between repeats it.
    ///
    /// # Errors
    /// See [`AuthError`].
    pub fn take_next(state: &Path, leave: impl FnOnce() -> std::io::Result<()>) -> Result<(), AuthError> {
        let next = next_folder(state);
        if !next.join("node.json").exists() {
            return Ok(());
        }
        let wrong = |source| AuthError::File { path: next.clone(), source };
        leave().map_err(wrong)?;
        Self::forget(state)?;
        std::fs::rename(&next, folder(state)).map_err(wrong)?;
        File::open(state).and_then(|f| f.sync_all()).map_err(wrong)
    }

    fn store_in(&self, folder: PathBuf) -> Result<(), AuthError> {
        std::fs::create_dir_all(&folder)
            .map_err(|source| AuthError::File { path: folder.clone(), source })?;
        let path = folder.join("node.json");
        let identity = serde_json::to_string_pretty(&self.identity)
            .map_err(|error| AuthError::Damaged { path: path.clone(), reason: error.to_string() })?;
        replace(&folder.join("node.key"), &self.key_pem)?;
        replace(&folder.join("authorities.crt"), &self.authorities_pem)?;
        replace(&folder.join("node.crt"), &self.certificate_pem)?;
        replace(&path, &identity)?;
        File::open(&folder)
            .and_then(|f| f.sync_all())
            .map_err(|source| AuthError::File { path: folder, source })
    }

    /// Forgets the identity.
    ///
    /// # Errors
    /// See [`AuthError`].
    pub fn forget(state: &Path) -> Result<(), AuthError> {
        let path = folder(state);
        match std::fs::remove_dir_all(&path) {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(AuthError::File { path, source })
            }
            _ => Ok(()),
        }
    }
}

fn read(path: &Path) -> Result<String, AuthError> {
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(FILE_BYTES_MAX).read_to_string(&mut text))
        .map_err(|source| AuthError::File { path: path.to_owned(), source })?;
    Ok(text)
}

/// Replaces a file whole, readable by its owner only.
///
/// # Errors
/// [`AuthError::File`].
pub fn replace(path: &Path, text: &str) -> Result<(), AuthError> {
    let next = path.with_extension("new");
    let write = || {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&next)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&next, path)
    };
    write().map_err(|source| AuthError::File { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn an_identity_comes_back_and_its_key_is_for_nobody_else() {
        let state = tempfile::tempdir().unwrap();
        assert!(Keys::load(state.path()).unwrap().is_none());
        let (key_pem, public) = new_key().unwrap();
        assert_eq!(public_key(&key_pem).unwrap(), public);
        let address = "192.0.2.1:7440".parse().unwrap();
        let identity = Identity { cluster: "c".into(), node: 3, address, bind: address, trust_version: 1 };
        let keys = Keys { identity, key_pem, certificate_pem: "x".into(), authorities_pem: "y".into() };
        keys.store(state.path()).unwrap();
        let back = Keys::load(state.path()).unwrap().unwrap();
        assert_eq!((back.identity, back.key_pem), (keys.identity, keys.key_pem));
        let mode = std::fs::metadata(state.path().join("identity/node.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        Keys::forget(state.path()).unwrap();
        assert!(Keys::load(state.path()).unwrap().is_none());
    }

    #[test]
    fn the_identity_of_the_next_start_takes_the_place_of_the_present_one() {
        let state = tempfile::tempdir().unwrap();
        let address = "192.0.2.1:7440".parse().unwrap();
        let keys = |node| Keys {
            identity: Identity { cluster: "c".into(), node, address, bind: address, trust_version: 0 },
            key_pem: String::new(),
            certificate_pem: String::new(),
            authorities_pem: String::new(),
        };
        keys(1).store(state.path()).unwrap();
        Keys::take_next(state.path(), || panic!("there is none")).unwrap();
        keys(2).store_next(state.path()).unwrap();
        let refused = Keys::take_next(state.path(), || Err(std::io::ErrorKind::Other.into()));
        assert!(refused.is_err());
        assert_eq!(Keys::load(state.path()).unwrap().unwrap().identity.node, 1);
        Keys::take_next(state.path(), || Ok(())).unwrap();
        assert_eq!(Keys::load(state.path()).unwrap().unwrap().identity.node, 2);
        Keys::take_next(state.path(), || panic!("it was taken")).unwrap();
    }

    #[test]
    fn a_damaged_identity_is_named_and_not_replaced() {
        let state = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(state.path().join("identity")).unwrap();
        std::fs::write(state.path().join("identity/node.json"), "{").unwrap();
        assert!(matches!(Keys::load(state.path()), Err(AuthError::Damaged { .. })));
    }
}
