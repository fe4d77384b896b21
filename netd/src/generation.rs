//! The generation of the kernel's packet filter: a number that grows by one with every change anybody makes
//! (NFT_MSG_GETGEN in linux/netfilter/nf_tables.h). Asking for it costs microseconds; reading the filter back does not.

use std::io;

use rtnetlink::sys::{Socket, SocketAddr};

/// NETLINK_NETFILTER.
const PROTOCOL: isize = 12;
/// Subsystem nf_tables in the high byte, the message in the low one.
const GET: u16 = 10 << 8 | 16;
const NEW: u16 = 10 << 8 | 15;
/// NLM_F_REQUEST.
const REQUEST: u16 = 1;
/// NFTA_GEN_ID, a number of 4 bytes in network order.
const GENERATION: u16 = 1;
/// Bytes of `struct nlmsghdr` and `struct nfgenmsg`.
const HEADER: usize = 16;
const FAMILY_HEADER: usize = 4;

/// A connection to the kernel's packet filter.
#[derive(Debug)]
pub struct Generations {
    socket: Socket,
}

impl Generations {
    /// Connects, in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The system's answer.
    pub fn connect() -> io::Result<Self> {
        let mut socket = Socket::new(PROTOCOL)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket })
    }

    /// The generation now. `None` when the kernel does not tell: then nothing is known about what changed.
    pub fn now(&self) -> Option<u32> {
        // An answer that is left over from a failed question would be taken for the next one's.
        let sequence: [u8; 4] = *b"gen?";
        let mut question = Vec::with_capacity(HEADER + FAMILY_HEADER);
        question.extend(u32::try_from(HEADER + FAMILY_HEADER).ok()?.to_ne_bytes());
        question.extend(GET.to_ne_bytes());
        question.extend(REQUEST.to_ne_bytes());
        question.extend(sequence);
        question.extend([0; 4 + FAMILY_HEADER]);
        self.socket.send(&question, 0).ok()?;
        // The kernel answers while it takes the question: there is nothing to wait for.
        let mut answer = Vec::with_capacity(4096);
        self.socket.recv(&mut answer, nix::libc::MSG_DONTWAIT).ok()?;
        read(&answer)
    }
}

/// The generation in an answer.
fn read(answer: &[u8]) -> Option<u32> {
    let length = usize::try_from(u32::from_ne_bytes(*answer.first_chunk()?)).ok()?;
    let kind = u16::from_ne_bytes(*answer.get(4..)?.first_chunk()?);
    if kind != NEW {
        return None;
    }
    let mut attributes = answer.get(HEADER + FAMILY_HEADER..length)?;
    loop {
        let length = usize::from(u16::from_ne_bytes(*attributes.first_chunk()?));
        let kind = u16::from_ne_bytes(*attributes.get(2..)?.first_chunk()?);
        if kind == GENERATION {
            return Some(u32::from_be_bytes(*attributes.get(4..length)?.first_chunk()?));
        }
        attributes = attributes.get(length.max(4).next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_generation_is_found_behind_other_attributes() {
        let mut answer = vec![36, 0, 0, 0];
        answer.extend(NEW.to_ne_bytes());
        answer.extend([0; 14]);
        answer.extend([5, 0, 3, 0, b'x', 0, 0, 0]);
        answer.extend([8, 0, 1, 0, 0, 0, 1, 2]);
        assert_eq!(read(&answer), Some(0x102));
    }

    proptest! {
        #[test]
        fn arbitrary_answers_never_panic(answer in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut shaped = answer.clone();
            if let Some(kind) = shaped.get_mut(4..6) {
                kind.copy_from_slice(&NEW.to_ne_bytes());
            }
            read(&answer);
            read(&shaped);
        }
    }
}
