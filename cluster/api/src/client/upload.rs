//! The body of a request: nothing, JSON, or a long stream that reports how much of it has gone.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::body::{Body, Bytes, Frame, SizeHint};
use tokio::io::{AsyncRead, ReadBuf};

/// Bytes of an upload that are read at once.
const CHUNK: usize = 256 << 10;

/// A stream to upload.
pub struct Upload {
    reader: Pin<Box<dyn AsyncRead + Send>>,
    length: Option<u64>,
    progress: Box<dyn FnMut(u64) + Send>,
    sent: u64,
    buffer: Vec<u8>,
}

impl Upload {
    /// An upload of everything that `reader` gives.
    pub fn new(reader: impl AsyncRead + Send + 'static) -> Self {
        Self {
            reader: Box::pin(reader),
            length: None,
            progress: Box::new(|_| ()),
            sent: 0,
            buffer: vec![0; CHUNK],
        }
    }

    /// Says how many bytes `reader` will give; fewer or more are an error.
    #[must_use]
    pub fn with_length(mut self, bytes: u64) -> Self {
        self.length = Some(bytes);
        self
    }

    /// Calls `progress` with the number of bytes read so far, after each piece.
    #[must_use]
    pub fn with_progress(mut self, progress: impl FnMut(u64) + Send + 'static) -> Self {
        self.progress = Box::new(progress);
        self
    }

    /// Number of bytes, when known.
    pub fn length(&self) -> Option<u64> {
        self.length
    }

    fn poll_chunk(&mut self, context: &mut Context<'_>) -> Poll<Option<io::Result<Bytes>>> {
        let mut buffer = ReadBuf::new(&mut self.buffer);
        match self.reader.as_mut().poll_read(context, &mut buffer) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Err(error)) => Poll::Ready(Some(Err(error))),
            Poll::Ready(Ok(())) => {
                let bytes = Bytes::copy_from_slice(buffer.filled());
                self.sent += bytes.len() as u64;
                let changed = self
                    .length
                    .is_some_and(|length| self.sent > length || (bytes.is_empty() && self.sent < length));
                if changed {
                    return Poll::Ready(Some(Err(io::Error::other(
                        "its size changed while it was being read",
                    ))));
                }
                (self.progress)(self.sent);
                Poll::Ready((!bytes.is_empty()).then_some(Ok(bytes)))
            }
        }
    }
}

/// What goes with a request.
pub(super) enum RequestBody {
    Full(Option<Bytes>),
    Upload(Box<Upload>),
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        match self.get_mut() {
            Self::Full(bytes) => Poll::Ready(bytes.take().map(|b| Ok(Frame::data(b)))),
            Self::Upload(upload) => upload.poll_chunk(context).map(|chunk| chunk.map(|c| c.map(Frame::data))),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Full(None))
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Full(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            Self::Upload(upload) => upload
                .length
                .map_or_else(SizeHint::default, |l| SizeHint::with_exact(l.saturating_sub(upload.sent))),
        }
    }
}
