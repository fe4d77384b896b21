//! How a message is cut into datagrams: `"bx", version 1 u8, last u8, total length u32 LE`, then a part of the message.
//!
//! Every datagram of a message carries the total length, so a receiver refuses an overlong message at its first datagram.

/// Bytes of the header.
pub const HEADER: usize = 8;
/// Most bytes of one datagram: below the default send buffer of Linux (212,992) with room for its bookkeeping.
pub const DATAGRAM_MAX: usize = 64 << 10;
/// Most bytes of a message in one datagram.
pub const PART_MAX: usize = DATAGRAM_MAX - HEADER;

/// A datagram that is no frame, or not the one expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Too short, or another protocol or version.
    #[error("not a frame of this protocol")]
    NotAFrame,
    /// The message is longer than the receiver allows.
    #[error("message of {total} bytes, at most {limit} are accepted")]
    TooLong {
        /// Announced length in bytes.
        total: usize,
        /// Limit of the receiver in bytes.
        limit: usize,
    },
    /// Parts that do not make up the announced message.
    #[error("the parts do not make up the announced message")]
    Inconsistent,
}

/// The datagrams of one message: headers and parts.
pub fn split(message: &[u8]) -> Vec<([u8; HEADER], &[u8])> {
    let total = u32::try_from(message.len()).unwrap_or(u32::MAX).to_le_bytes();
    let [a, b, c, d] = total;
    let mut parts: Vec<&[u8]> = message.chunks(PART_MAX).collect();
    if parts.is_empty() {
        parts.push(&[]);
    }
    let last = parts.len() - 1;
    let frame = |(i, part)| ([b'b', b'x', 1, u8::from(i == last), a, b, c, d], part);
    parts.into_iter().enumerate().map(frame).collect()
}

/// Puts the datagrams of one message together.
#[derive(Debug)]
pub struct Assembler {
    limit: usize,
    total: Option<usize>,
    message: Vec<u8>,
}

impl Assembler {
    /// Accepts a message of at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { limit, total: None, message: Vec::new() }
    }

    /// True before the first datagram.
    pub fn is_empty(&self) -> bool {
        self.total.is_none()
    }

    /// Takes one datagram; answers the message when it was the last.
    ///
    /// # Errors
    /// The datagram does not belong here; the connection is to be closed.
    pub fn push(&mut self, datagram: &[u8]) -> Result<Option<Vec<u8>>, FrameError> {
        let Some((header, part)) = datagram.split_first_chunk::<HEADER>() else {
            return Err(FrameError::NotAFrame);
        };
        let [b'b', b'x', 1, last @ (0 | 1), a, b, c, d] = *header else { return Err(FrameError::NotAFrame) };
        let total = usize::try_from(u32::from_le_bytes([a, b, c, d])).map_err(|_| FrameError::NotAFrame)?;
        if total > self.limit {
            return Err(FrameError::TooLong { total, limit: self.limit });
        }
        let known = *self.total.get_or_insert(total);
        let length = self.message.len() + part.len();
        let complete = length == total;
        // A part that adds nothing would let a peer keep us here for ever.
        if known != total || length > total || complete != (last == 1) || (part.is_empty() && !complete) {
            return Err(FrameError::Inconsistent);
        }
        self.message.extend_from_slice(part);
        if !complete {
            return Ok(None);
        }
        self.total = None;
        Ok(Some(std::mem::take(&mut self.message)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn any_message_survives_being_cut(length in 0usize..300_000) {
            let message: Vec<u8> = (0..=250).cycle().take(length).collect();
            let mut assembler = Assembler::new(300_000);
            let mut result = None;
            for (header, part) in split(&message) {
                prop_assert!(result.is_none());
                result = assembler.push(&[header.as_slice(), part].concat()).unwrap();
            }
            prop_assert_eq!(result, Some(message));
        }

        #[test]
        fn arbitrary_datagrams_never_panic(parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..8)) {
            let mut assembler = Assembler::new(64);
            for part in parts {
                if assembler.push(&part).is_err() {
                    break;
                }
            }
        }
    }

    #[test]
    fn an_overlong_message_is_refused_at_its_first_datagram() {
        let message = vec![0; PART_MAX * 2];
        let (header, part) = split(&message)[0];
        let error = Assembler::new(1000).push(&[header.as_slice(), part].concat()).unwrap_err();
        assert_eq!(error, FrameError::TooLong { total: PART_MAX * 2, limit: 1000 });
    }

    #[test]
    fn empty_parts_that_would_go_on_for_ever_are_refused() {
        let mut assembler = Assembler::new(1000);
        assert_eq!(assembler.push(&[b'b', b'x', 1, 0, 5, 0, 0, 0]), Err(FrameError::Inconsistent));
    }
}
