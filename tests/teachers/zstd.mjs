// Zstandard, decompressed after RFC 8878, for versions of Node that have it not. Frames of one
// piece, as Riegeli writes them: no dictionary, and checksums are passed over.

import { Bytes, bit, must } from "./bytes.mjs";

// A coded number is a base plus some extra bits; by code, those of lengths and of matches.
const LITERAL_BITS = [...Array(16).fill(0), 1, 1, 1, 1, 2, 2, 3, 3, 4, 6, 7, 8, 9, 10, 11, 12,
  13, 14, 15, 16];
const MATCH_BITS = [...Array(32).fill(0), 1, 1, 1, 1, 2, 2, 3, 3, 4, 4, 5, 7, 8, 9, 10, 11, 12,
  13, 14, 15, 16];
const basesOf = (bits, first) => bits.map((_, code) =>
  bits.slice(0, code).reduce((sum, n) => sum + 2 ** n, first));
const LITERAL_BASES = basesOf(LITERAL_BITS, 0);
const MATCH_BASES = basesOf(MATCH_BITS, 3);
const DEFAULTS = [ // of literal lengths, offsets, match lengths: log of the size, frequencies
  [6, [4, 3, ...Array(11).fill(2), 1, 1, 1, ...Array(9).fill(2), 3, 2, 1, 1, 1, 1, 1,
    -1, -1, -1, -1]],
  [5, [1, 1, 1, 1, 1, 1, 2, 2, 2, ...Array(15).fill(1), -1, -1, -1, -1, -1]],
  [6, [1, 4, 3, 2, 2, 2, 2, 2, 2, ...Array(37).fill(1), ...Array(7).fill(-1)]],
];

/** Bits that are read from the last to the first; beyond the first there are zeros. */
class Backward {
  constructor(buffer) {
    this.buffer = buffer;
    this.at = 8 * buffer.length - 1;
    while (!bit(buffer, this.at)) this.at--; // the highest one bit marks the end
  }
  read(count) {
    let value = 0;
    for (let j = 0; j < count; j++) {
      this.at--;
      value = 2 * value + (this.at >= 0 ? bit(this.buffer, this.at) : 0);
    }
    return value;
  }
}

/** The table of a finite-state entropy code: symbol, bits to read and base, by state. */
function stateTable([log, frequencies]) {
  const size = 1 << log;
  const symbols = Array(size);
  let high = size;
  frequencies.forEach((n, symbol) => n < 0 && (symbols[--high] = symbol));
  let at = 0;
  frequencies.forEach((n, symbol) => {
    for (let i = 0; i < n; i++) {
      symbols[at] = symbol;
      do at = (at + (size >> 1) + (size >> 3) + 3) % size; while (at >= high);
    }
  });
  const next = frequencies.map(Math.abs);
  const table = symbols.map((symbol) => {
    const bits = log - (31 - Math.clz32(next[symbol]));
    return { symbol, bits, base: (next[symbol]++ << bits) - size };
  });
  return { log, table };
}

function readFrequencies(bytes) {
  let at = 0;
  const section = bytes.buffer.subarray(bytes.at);
  const read = (count) => {
    let value = 0;
    for (let j = 0; j < count; j++) value += bit(section, at++) << j;
    return value;
  };
  const log = read(4) + 5;
  const found = [];
  for (let left = 1 << log; left > 0; ) {
    const bits = 32 - Math.clz32(left + 1);
    const below = (1 << bits) - 2 - left; // so many values have one bit less
    let value = read(bits - 1);
    if (value >= below) {
      value += read(1) << (bits - 1);
      if (value >> (bits - 1)) value -= below;
    }
    found.push(value - 1);
    left -= Math.abs(value - 1);
    for (let more = value === 1 ? 3 : 0; more === 3; ) {
      more = read(2);
      found.push(...Array(more).fill(0));
    }
  }
  bytes.take(Math.ceil(at / 8));
  return [log, found];
}

function readWeights(bytes) {
  const head = bytes.uint8();
  if (head >= 128) {
    const packed = bytes.take(Math.ceil((head - 127) / 2));
    return Array.from({ length: head - 127 }, (_, i) => (packed[i >> 1] >> (i % 2 ? 0 : 4)) & 15);
  }
  const part = new Bytes(bytes.take(head));
  const { log, table } = stateTable(readFrequencies(part));
  const stream = new Backward(part.rest());
  const states = [stream.read(log), stream.read(log)];
  const found = [];
  for (let i = 0; ; i = 1 - i) {
    const { symbol, bits, base } = table[states[i]];
    found.push(symbol);
    states[i] = base + stream.read(bits);
    if (stream.at < 0) return [...found, table[states[1 - i]].symbol];
  }
}

function huffmanTable(bytes) {
  const weights = readWeights(bytes);
  const sum = weights.reduce((total, w) => total + (w && 2 ** (w - 1)), 0);
  const log = 32 - Math.clz32(sum);
  weights.push(Math.log2(2 ** log - sum) + 1);
  const table = [];
  for (let w = 1; w <= log; w++)
    weights.forEach((weight, symbol) => {
      if (weight === w) for (let i = 0; i < 2 ** (w - 1); i++) table.push([symbol, log + 1 - w]);
    });
  return { log, table };
}

function readLiterals(bytes, tables) {
  const format = bytes.buffer[bytes.at];
  const [type, sizing] = [format & 3, (format >> 2) & 3];
  if (type < 2) {
    const size = sizing === 1 ? bytes.take(2).readUInt16LE() >> 4
      : sizing === 3 ? bytes.take(3).readUIntLE(0, 3) >> 4 : bytes.uint8() >> 3;
    return type ? Buffer.alloc(size, bytes.uint8()) : bytes.take(size);
  }
  const [length, bits] = [[3, 10], [3, 10], [4, 14], [5, 18]][sizing];
  const header = Math.floor(bytes.take(length).readUIntLE(0, length) / 16);
  const [size, packed] = [header % 2 ** bits, Math.floor(header / 2 ** bits)];
  const part = new Bytes(bytes.take(packed));
  if (type === 2) tables.huffman = huffmanTable(part);
  const sizes = sizing ? [0, 1, 2].map(() => part.take(2).readUInt16LE()) : [];
  const { log, table } = tables.huffman;
  const found = [];
  for (const section of [...sizes.map((n) => part.take(n)), part.rest()]) {
    const stream = new Backward(section);
    let state = stream.read(log);
    while (stream.at > -log) {
      const [symbol, count] = table[state];
      found.push(symbol);
      state = ((state << count) % (1 << log)) + stream.read(count);
    }
  }
  must(found.length === size, "have the literals that a block says");
  return Buffer.from(found);
}

function readBlock(bytes, tables, out) {
  const literals = new Bytes(readLiterals(bytes, tables));
  let count = bytes.uint8();
  if (count === 255) count = bytes.take(2).readUInt16LE() + 0x7f00;
  else if (count > 127) count = (count - 128) * 256 + bytes.uint8();
  const modes = count ? bytes.uint8() : 0;
  for (let i = 0; count && i < 3; i++) {
    const mode = (modes >> (6 - 2 * i)) & 3; // 3: that of the block before
    if (mode === 0) tables.codes[i] = stateTable(DEFAULTS[i]);
    if (mode === 1)
      tables.codes[i] = { log: 0, table: [{ symbol: bytes.uint8(), bits: 0, base: 0 }] };
    if (mode === 2) tables.codes[i] = stateTable(readFrequencies(bytes));
  }
  const stream = count ? new Backward(bytes.rest()) : null;
  const states = count ? tables.codes.map(({ log }) => stream.read(log)) : [];
  for (let n = 0; n < count; n++) {
    const entries = tables.codes.map(({ table }, i) => table[states[i]]);
    const [literal, offset, match] = entries.map(({ symbol }) => symbol);
    const code = 2 ** offset + stream.read(offset);
    const length = MATCH_BASES[match] + stream.read(MATCH_BITS[match]);
    const before = LITERAL_BASES[literal] + stream.read(LITERAL_BITS[literal]);
    if (n < count - 1)
      for (const i of [0, 2, 1]) states[i] = entries[i].base + stream.read(entries[i].bits);
    out.push(...literals.take(before));
    const distance = distanceOf(code, before, tables.distances);
    must(distance > 0 && distance <= out.length, "copy what is there");
    for (let i = 0; i < length; i++) out.push(out[out.length - distance]);
  }
  for (const byte of literals.rest()) out.push(byte);
}

/** Codes 1 to 3 are distances that were used before, which are kept: the last one first. */
function distanceOf(code, literals, distances) {
  const index = code > 3 ? 3 : code - 1 + (literals ? 0 : 1);
  const found = code > 3 ? code - 3 : index === 3 ? distances[0] - 1 : distances[index];
  if (index) distances.splice(Math.min(index, 2), 1);
  if (index) distances.unshift(found);
  return found;
}

/** The content of a frame. */
export function zstd(data) {
  const bytes = new Bytes(data);
  must(bytes.uint32() === 0xfd2fb528, "have a frame of Zstandard");
  const flags = bytes.uint8();
  const single = (flags >> 5) & 1;
  const sizes = [[0, 1, 2, 4][flags & 3], [single, 2, 4, 8][flags >> 6]];
  bytes.take((single ? 0 : 1) + sizes[0] + sizes[1]); // window, dictionary, size of content
  const tables = { huffman: null, codes: [null, null, null], distances: [1, 4, 8] };
  const out = [];
  for (let last = 0; !last; ) {
    const header = bytes.take(3).readUIntLE(0, 3);
    last = header & 1;
    const [type, size] = [(header >> 1) & 3, header >> 3];
    if (type === 2) readBlock(new Bytes(bytes.take(size)), tables, out);
    else for (const byte of type ? Buffer.alloc(size, bytes.take(1)) : bytes.take(size)) out.push(byte);
  }
  bytes.take(flags & 4); // a checksum
  bytes.end();
  return Buffer.from(out);
}

