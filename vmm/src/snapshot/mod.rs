//! Snapshots: the state of a VM as a file of named sections beside a file with its memory. `README.md` has design and format.

pub mod codec;
pub mod file;
pub mod plain;
pub mod restore;
pub mod save;
pub mod sections;

/// Name of a snapshot: random.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Id(pub [u8; 16]);

impl Id {
    /// A new one.
    ///
    /// # Errors
    /// The kernel has no random bytes.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 16];
        crate::virtio::rng::random(&mut bytes)?;
        Ok(Self(bytes))
    }
}

impl std::fmt::Display for Id {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
