//! The identity of a VM: a ULID chosen by whoever asks for the VM, so that repeating a request is harmless.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use ulid::Ulid;

/// Identity of one VM for its whole life, on whatever node it runs. 26 characters of Crockford base 32.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VmId(Ulid);

/// A text that is not the id of a VM.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a VM id: 26 characters of Crockford base 32 (a ULID) are needed")]
pub struct NotAVmId {
    /// The text, cut to 64 characters.
    pub text: String,
}

impl VmId {
    /// Makes an id of 128 bits: 48 bits of Unix time in milliseconds, then 80 random bits (ULID specification).
    pub fn from_parts(unix_ms: u64, random: u128) -> Self {
        Self(Ulid::from_parts(unix_ms, random))
    }

    /// The id as a number, for ordering and for deriving shorter names.
    pub fn to_u128(self) -> u128 {
        self.0.0
    }

    /// The id with this number.
    pub fn from_u128(value: u128) -> Self {
        Self(Ulid(value))
    }
}

impl From<VmId> for String {
    fn from(id: VmId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for VmId {
    type Error = NotAVmId;

    fn try_from(text: String) -> Result<Self, NotAVmId> {
        text.parse()
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VmId({})", self.0)
    }
}

impl FromStr for VmId {
    type Err = NotAVmId;

    fn from_str(text: &str) -> Result<Self, NotAVmId> {
        // Only the canonical spelling is accepted: ids are used as file and cgroup names.
        match Ulid::from_string(text) {
            Ok(id) if id.array_to_str(&mut [0; ulid::ULID_LEN]) == text => Ok(Self(id)),
            _ => Err(NotAVmId { text: text.chars().take(64).collect() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_survives_its_text_form() {
        let id = VmId::from_parts(1_795_000_000_000, 42);
        assert_eq!(id.to_string().parse::<VmId>(), Ok(id));
        assert_eq!(id.to_string().len(), 26);
    }

    #[test]
    fn lower_case_paths_and_overlong_texts_are_refused() {
        let id = VmId::from_parts(1_795_000_000_000, 42).to_string();
        for text in [id.to_lowercase(), "../../etc/passwd".into(), "A".repeat(10_000), String::new()] {
            let error = text.parse::<VmId>().expect_err("must be refused");
            assert!(error.text.len() <= 64);
        }
    }
}
