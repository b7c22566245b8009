//! Zlib streams of exactly known length, for PNG and TIFF.

use crate::budget;
use crate::error::Result;
use flate2::{Decompress, FlushDecompress, Status};

/// How a stream ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// All wanted bytes came.
    Full,
    /// The stream says that it is over.
    Finished,
    /// The input ran out.
    Starved,
    /// The stream is broken.
    Broken(String),
}

/// A zlib decoder over input in pieces.
pub(crate) struct Inflater<'a, I: Iterator<Item = &'a [u8]>> {
    decoder: Decompress,
    pieces: I,
    piece: &'a [u8],
    finished: bool,
}

impl<'a, I: Iterator<Item = &'a [u8]>> Inflater<'a, I> {
    pub(crate) fn new(pieces: I) -> Self {
        Self {
            decoder: Decompress::new(true),
            pieces,
            piece: &[],
            finished: false,
        }
    }

    /// The pieces that were not taken yet.
    pub(crate) fn rest(&self) -> &I {
        &self.pieces
    }

    /// Fills `out` as far as it goes; gives the bytes written and why it stopped.
    pub(crate) fn read(&mut self, out: &mut [u8]) -> Result<(usize, Ending)> {
        let mut written = 0;
        while written < out.len() {
            budget::check()?;
            if self.finished {
                return Ok((written, Ending::Finished));
            }
            if self.piece.is_empty() {
                match self.pieces.next() {
                    Some(piece) => {
                        self.piece = piece;
                        continue;
                    }
                    None => return Ok((written, Ending::Starved)),
                }
            }
            let (consumed, produced) = (self.decoder.total_in(), self.decoder.total_out());
            let status =
                self.decoder
                    .decompress(self.piece, &mut out[written..], FlushDecompress::None);
            let consumed = (self.decoder.total_in() - consumed) as usize;
            let produced = (self.decoder.total_out() - produced) as usize;
            self.piece = &self.piece[consumed..];
            written += produced;
            match status {
                Ok(Status::StreamEnd) => self.finished = true,
                Ok(_) if consumed == 0 && produced == 0 => {
                    // No progress with input at hand: the stream cannot go on.
                    self.piece = &[];
                }
                Ok(_) => {}
                Err(error) => return Ok((written, Ending::Broken(error.to_string()))),
            }
        }
        Ok((written, Ending::Full))
    }
}
