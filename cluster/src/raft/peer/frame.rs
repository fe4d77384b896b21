//! Frames on a connection between nodes: length (4 bytes, little-endian, without itself), kind (1), number (8), content.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Largest frame in bytes: a batch of entries as openraft sends them at most, or a part of a snapshot.
pub const FRAME_BYTES_MAX: usize = 64 << 20;
/// Bytes of kind and number.
const HEAD: usize = 9;

/// What a frame is about. The first frame of a connection says what the connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// An append request, or its answer.
    Append,
    /// A question, as JSON, or its answer.
    Call,
    /// The beginning of a snapshot: [`super::snapshot::Begin`] as JSON.
    SnapshotBegin,
    /// Some records of a snapshot.
    SnapshotPart,
    /// The end of a snapshot, or the answer to it.
    SnapshotEnd,
    /// A request for content.
    ContentBegin,
    /// Some of it.
    ContentPart,
    /// Its end, or that there is none.
    ContentEnd,
    /// HTTP/1.1 follows, no more frames.
    Requests,
}

impl Kind {
    fn byte(self) -> u8 {
        match self {
            Self::Append => 1,
            Self::Call => 2,
            Self::SnapshotBegin => 3,
            Self::SnapshotPart => 4,
            Self::SnapshotEnd => 5,
            Self::ContentBegin => 6,
            Self::ContentPart => 7,
            Self::ContentEnd => 8,
            Self::Requests => 9,
        }
    }

    fn of(byte: u8) -> Option<Self> {
        let of_raft = [Self::Append, Self::Call, Self::SnapshotBegin, Self::SnapshotPart, Self::SnapshotEnd];
        let others = [Self::ContentBegin, Self::ContentPart, Self::ContentEnd, Self::Requests];
        of_raft.into_iter().chain(others).find(|kind| kind.byte() == byte)
    }
}

/// A frame.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it is about.
    pub kind: Kind,
    /// Chosen by who asks; the answer has the same.
    pub number: u64,
    /// The content.
    pub content: Vec<u8>,
}

fn wrong(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// Writes a frame whose content `fill` adds.
///
/// # Errors
/// `fill` fails, or the frame is too large.
pub fn put(
    out: &mut Vec<u8>,
    kind: Kind,
    number: u64,
    fill: impl FnOnce(&mut Vec<u8>) -> io::Result<()>,
) -> io::Result<()> {
    let begin = out.len();
    out.extend_from_slice(&[0; 4]);
    out.push(kind.byte());
    out.extend_from_slice(&number.to_le_bytes());
    fill(out)?;
    let length = out.len().saturating_sub(begin).saturating_sub(4);
    if length > FRAME_BYTES_MAX {
        return Err(wrong(format!("a frame of {length} bytes, {FRAME_BYTES_MAX} are possible")));
    }
    let length = u32::try_from(length).map_err(io::Error::other)?.to_le_bytes();
    for (to, from) in out.iter_mut().skip(begin).zip(length) {
        *to = from;
    }
    Ok(())
}

/// The next frame; `None` when the other end closed the connection between two frames.
///
/// # Errors
/// The connection broke, or what came is no frame.
pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Frame>> {
    let mut length = [0; 4];
    match stream.read_exact(&mut length).await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    };
    let length = usize::try_from(u32::from_le_bytes(length)).map_err(io::Error::other)?;
    let content = length.checked_sub(HEAD).filter(|_| length <= FRAME_BYTES_MAX);
    let content = content.ok_or_else(|| wrong(format!("a frame of {length} bytes")))?;
    let byte = stream.read_u8().await?;
    let kind = Kind::of(byte).ok_or_else(|| wrong(format!("a frame of the unknown kind {byte}")))?;
    let number = stream.read_u64_le().await?;
    // Memory grows with what has come, not with what was announced.
    let mut bytes = Vec::with_capacity(content.min(64 << 10));
    let limit = u64::try_from(content).map_err(io::Error::other)?;
    stream.take(limit).read_to_end(&mut bytes).await?;
    if bytes.len() != content {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some(Frame { kind, number, content: bytes }))
}

/// Sends one frame.
///
/// # Errors
/// The connection broke, or the frame is too large.
pub async fn write(
    stream: &mut (impl AsyncWrite + Unpin),
    kind: Kind,
    number: u64,
    content: &[u8],
) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(content.len().saturating_add(HEAD).saturating_add(4));
    put(&mut bytes, kind, number, |out| {
        out.extend_from_slice(content);
        Ok(())
    })?;
    stream.write_all(&bytes).await?;
    stream.flush().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_come_back_one_after_the_other() {
        let (mut ours, mut theirs) = tokio::io::duplex(1 << 20);
        write(&mut ours, Kind::Append, 1, b"one").await.unwrap();
        write(&mut ours, Kind::Call, u64::MAX, b"").await.unwrap();
        drop(ours);
        let first = read(&mut theirs).await.unwrap().unwrap();
        assert_eq!(first, Frame { kind: Kind::Append, number: 1, content: b"one".to_vec() });
        let second = read(&mut theirs).await.unwrap().unwrap();
        assert_eq!(second, Frame { kind: Kind::Call, number: u64::MAX, content: vec![] });
        assert_eq!(read(&mut theirs).await.unwrap(), None);
    }

    #[tokio::test]
    async fn garbage_is_refused_with_what_is_wrong() {
        let cases: [(&[u8], &str); 4] = [
            (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "542393671 bytes"),
            (&[8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0], "a frame of 8 bytes"),
            (&[9, 0, 0, 0, 77, 0, 0, 0, 0, 0, 0, 0, 0], "unknown kind 77"),
            (&[10, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0], "end of file"),
        ];
        for (bytes, reason) in cases {
            let (mut ours, mut theirs) = tokio::io::duplex(1 << 10);
            ours.write_all(bytes).await.unwrap();
            drop(ours);
            let error = read(&mut theirs).await.unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
    }
}
