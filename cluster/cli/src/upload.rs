//! What is uploaded: a file, standard input, or a folder that becomes a tar on the way.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};

use blixard_api::client::Upload;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::mpsc;

use crate::error::CliError;

/// Bytes of one piece between the thread that makes a stream and the connection.
const PIECE: usize = 128 << 10;
/// Pieces that wait in between.
const PIECES: usize = 8;

/// An upload of standard input, a tar file, or a folder with an OCI layout.
pub fn open(source: &Path) -> Result<Upload, CliError> {
    if source == Path::new("-") {
        return Ok(Upload::new(tokio::io::stdin()));
    }
    let shown = source.display();
    let cannot = |e| CliError::local(format!("cannot read {shown}"), e);
    let meta = fs::metadata(source).map_err(cannot)?;
    if meta.is_dir() {
        // OCI image-layout specification: every layout has this file.
        if !source.join("oci-layout").is_file() {
            return Err(CliError::Usage {
                message: format!("{shown} is a folder without an OCI layout (no file oci-layout in it)"),
                suggestion: format!(
                    "a root file system goes in as a tar: tar -C {shown} --numeric-owner -c . | blixard image import - --name NAME"
                ),
            });
        }
        let folder = source.to_owned();
        return Ok(produced(move |out| tar_of(&folder, out)));
    }
    let file = File::open(source).map_err(cannot)?;
    let upload = Upload::new(tokio::fs::File::from_std(file));
    Ok(if meta.is_file() { upload.with_length(meta.len()) } else { upload })
}

/// An upload of what `work` writes, in a thread of its own; an error of it ends the upload with this error.
pub fn produced(work: impl FnOnce(&mut dyn Write) -> io::Result<()> + Send + 'static) -> Upload {
    let (send, receive) = mpsc::channel(PIECES);
    tokio::task::spawn_blocking(move || {
        let mut writer = io::BufWriter::with_capacity(PIECE, Pieces(send));
        let result = work(&mut writer).and_then(|()| writer.flush());
        if let Err(error) = result {
            // Nobody listens when the upload was given up.
            let _ = writer.get_ref().0.blocking_send(Err(error));
        }
    });
    Upload::new(Received { receive, rest: vec![], at: 0 })
}

fn tar_of(folder: &Path, out: &mut dyn Write) -> io::Result<()> {
    let mut builder = tar::Builder::new(out);
    builder.follow_symlinks(false);
    builder.append_dir_all(".", folder)?;
    builder.into_inner()?.flush()
}

/// The writing end.
struct Pieces(mpsc::Sender<io::Result<Vec<u8>>>);

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.blocking_send(Ok(bytes.to_vec())) {
            Ok(()) => Ok(bytes.len()),
            Err(_) => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The reading end.
struct Received {
    receive: mpsc::Receiver<io::Result<Vec<u8>>>,
    rest: Vec<u8>,
    at: usize,
}

impl AsyncRead for Received {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.at >= this.rest.len() {
            match this.receive.poll_recv(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => return Poll::Ready(Ok(())),
                Poll::Ready(Some(piece)) => (this.rest, this.at) = (piece?, 0),
            }
        }
        let left = this.rest.get(this.at..).unwrap_or_default();
        let length = left.len().min(buffer.remaining());
        buffer.put_slice(left.get(..length).unwrap_or_default());
        this.at += length;
        Poll::Ready(Ok(()))
    }
}

/// The name of an image from the name of its file: without folder and without the endings of archives.
pub fn name_from(source: &Path) -> Option<String> {
    let canonical = if source.file_name().is_none() { fs::canonicalize(source).ok() } else { None };
    let path: PathBuf = canonical.unwrap_or_else(|| source.to_owned());
    let mut name = path.file_name()?.to_str()?.to_ascii_lowercase();
    for ending in [".gz", ".xz", ".zst", ".bz2", ".tgz", ".txz", ".tar", ".oci"] {
        if let Some(shorter) = name.strip_suffix(ending) {
            name = shorter.into();
        }
    }
    blixard_api::check_name(&name, true).is_ok().then_some(name)
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[test]
    fn the_name_of_a_file_is_the_name_of_the_image_when_it_can_be_one() {
        for (path, name) in [
            ("/x/busybox.tar", Some("busybox")),
            ("Debian-12.tar.gz", Some("debian-12")),
            ("img.oci", Some("img")),
            ("layout/", Some("layout")),
            ("my image.tar", None),
            ("-", None),
        ] {
            assert_eq!(name_from(Path::new(path)).as_deref(), name, "{path}");
        }
    }

    #[tokio::test]
    async fn what_a_thread_writes_arrives_whole_and_its_error_too() {
        let (send, receive) = mpsc::channel(PIECES);
        let mut reader = Received { receive, rest: vec![], at: 0 };
        tokio::task::spawn_blocking(move || {
            let mut writer = Pieces(send.clone());
            writer.write_all(&[7; 300_000]).unwrap();
            send.blocking_send(Err(io::Error::other("broken"))).unwrap();
        });
        let mut bytes = vec![0; 300_000];
        reader.read_exact(&mut bytes).await.unwrap();
        assert!(bytes.iter().all(|b| *b == 7));
        assert_eq!(reader.read_u8().await.unwrap_err().to_string(), "broken");
    }

    #[test]
    fn a_folder_without_an_oci_layout_is_refused_with_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let error = open(folder.path()).err().unwrap();
        assert!(error.to_text().contains("tar -C"), "{}", error.to_text());
        assert_eq!(error.code(), 2);
        assert_eq!(open(Path::new("/does/not/exist")).err().unwrap().code(), 3);
    }
}
