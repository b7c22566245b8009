//! CLIP's byte-pair encoding of text.

use instant_clip_tokenizer::Token;
use thiserror::Error;

/// OpenAI's merges for CLIP: the part that its 49,408 tokens use of `bpe_simple_vocab_16e6.txt`
/// (see `vocabulary/README.md` for its origin and licence).
pub const OPENAI_MERGES: &str = include_str!("../vocabulary/clip_merges.txt");

/// Why there is no tokenizer, or a text cannot be encoded.
#[allow(missing_docs)] // The messages say it.
#[derive(Debug, Error)]
pub enum TokenizerError {
    #[error("the tokenizer's merges are malformed: {0}")]
    Merges(String),
    #[error("the merges make {found} tokens, the model has {wanted}")]
    Vocabulary { found: usize, wanted: usize },
    #[error(
        "the text has {found} tokens with its start and end, the model takes {context}: `{text}`"
    )]
    TooLong {
        text: String,
        found: usize,
        context: usize,
    },
}

/// Texts as the text tower takes them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    /// `texts × length` ids, row-major; a shorter text is padded with zeros.
    pub ids: Vec<i32>,
    /// Tokens of the longest text.
    pub length: usize,
}

/// Encodes texts for one model.
pub struct Tokenizer {
    encoder: instant_clip_tokenizer::Tokenizer,
    context: usize,
}

impl Tokenizer {
    /// A tokenizer from its merges (one heading line, then one pair per line, most frequent
    /// first), for a model with `vocabulary` tokens that takes `context` of them.
    pub fn new(
        merges: &str,
        vocabulary: usize,
        context: usize,
    ) -> Result<Tokenizer, TokenizerError> {
        let largest = u16::try_from(vocabulary).map_err(|_| TokenizerError::Vocabulary {
            found: usize::from(u16::MAX),
            wanted: vocabulary,
        })?;
        let encoder =
            instant_clip_tokenizer::Tokenizer::with_vocabulary(merges.as_bytes(), largest)
                .map_err(|error| TokenizerError::Merges(error.to_string()))?;
        let found = usize::from(encoder.end_of_text().to_u16()) + 1;
        if found != vocabulary {
            return Err(TokenizerError::Vocabulary {
                found,
                wanted: vocabulary,
            });
        }
        Ok(Tokenizer { encoder, context })
    }

    /// The tokens of one text with its start and end, unpadded.
    ///
    /// HTML entities and mojibake are taken as they are; the reference mends both with `ftfy`.
    pub fn encode(&self, text: &str) -> Result<Vec<i32>, TokenizerError> {
        let mut tokens: Vec<Token> = vec![self.encoder.start_of_text()];
        self.encoder.encode(text.trim(), &mut tokens);
        tokens.push(self.encoder.end_of_text());
        if tokens.len() > self.context {
            return Err(TokenizerError::TooLong {
                text: text.chars().take(60).collect(),
                found: tokens.len(),
                context: self.context,
            });
        }
        Ok(tokens
            .into_iter()
            .map(|token| i32::from(token.to_u16()))
            .collect())
    }

    /// Several texts as one batch, as long as the longest of them. What follows a text's end
    /// cannot change its embedding, so padding further, as the reference does, only costs time.
    pub fn encode_batch<T: AsRef<str>>(&self, texts: &[T]) -> Result<Tokens, TokenizerError> {
        let mut rows = Vec::with_capacity(texts.len());
        for text in texts {
            rows.push(self.encode(text.as_ref())?);
        }
        let length = rows.iter().map(Vec::len).max().unwrap_or(0);
        let mut ids = Vec::with_capacity(length * rows.len());
        for mut row in rows {
            row.resize(length, 0);
            ids.extend(row);
        }
        Ok(Tokens { ids, length })
    }
}
