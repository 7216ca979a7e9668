-- What a running attempt writes. Every function takes (root; id, fence, …) and answers 'lost' to an old fence.

-- The record if this fence is current and the attempt has not ended, else nil.
local function held(k, fence, fields)
  local rec = load_record(k, fields or FIELDS)
  if not rec or rec.fence ~= tonumber(fence) or rec.status ~= 'running' then return nil, rec end
  return rec
end

-- mark_start(root; id, fence, call, lease_ms, event data): step 4. Writes the start of a call that must not run
-- twice, under the fence and a live lease, and renews the lease. Answers 'ok', 'cancel' or 'lost'.
local function mark_start(keys, args)
  local k, now = keys_of(keys[1], args[1]), now_ms()
  local rec = held(k, args[2])
  if not rec or rec.lease_until <= now then return 'lost' end
  if rec.cancel then return 'cancel' end
  local lease_until = now + tonumber(args[4])
  if redis.call('HSETNX', k.job, 'm:' .. args[3], args[2]) == 1 then emit(k, rec, now, 'tool.started', args[5]) end
  tell(k, rec)
  redis.call('HSET', k.job, 'lease_until', lease_until, 'seq', rec.seq)
  return 'ok'
end

-- withdraw_mark(root; id, fence, call): the call was surely not sent.
local function withdraw_mark(keys, args)
  local k = keys_of(keys[1], args[1])
  if not held(k, args[2]) then return 'lost' end
  if redis.call('HGET', k.job, 'm:' .. args[3]) == args[2] then redis.call('HDEL', k.job, 'm:' .. args[3]) end
  return 'ok'
end

-- progress(root; id, fence, wseq, tool, stage, percent, message, results…, events…). `wseq` grows with each write of
-- an attempt, so a write that is repeated because its answer was lost tells its events once.
local function progress(keys, args)
  local k, now = keys_of(keys[1], args[1]), now_ms()
  local rec = held(k, args[2])
  if not rec then return 'lost' end
  local wseq = tonumber(args[3])
  if wseq <= rec.wseq then return 'ok' end
  apply_changes(k, rec, now, args, 8)
  tell(k, rec)
  local set = { 'wseq', args[3], 'seq', rec.seq, 'done', rec.done, 'failed', rec.failed }
  for i, name in ipairs({ 'tool', 'stage', 'percent', 'message' }) do
    if args[3 + i] ~= '' then set[#set + 1] = name; set[#set + 1] = args[3 + i] end
  end
  redis.call('HSET', k.job, unpack(set))
  return 'ok'
end

-- renew(root; lease_ms, (id, fence)*): step 5. One answer a job: 'held', 'cancel' or 'lost'. A lease that ran out but
-- that nobody took is held again: the fence is what counts.
local function renew(keys, args)
  local now, answers = now_ms(), {}
  for i = 2, #args, 2 do
    local k = keys_of(keys[1], args[i])
    local rec = held(k, args[i + 1])
    if rec then redis.call('HSET', k.job, 'lease_until', now + tonumber(args[1])) end
    answers[#answers + 1] = not rec and 'lost' or (rec.cancel and 'cancel' or 'held')
  end
  return answers
end

-- An attempt that made a job unknown tells the true result while nobody has decided: the job leaves `unknown` by a
-- new generation, as by a decision, since a terminal status never changes within one.
local function settle_unknown(k, rec, now, args, i)
  local results = tonumber(args[i])
  local fits = results > 0
  for n = 1, results do
    if redis.call('HEXISTS', k.job, 'u:' .. args[i + 2 * n - 1]) == 0 then fits = false end
  end
  if not fits or #redis.call('HKEYS', k.res) + results < rec.total then return false end
  rec.generation = rec.generation + 1
  redis.call('HSET', k.job, 'generation', rec.generation)
  local decisions, names = decisions_of(k)
  if #names > 0 then
    -- Persons had decided other calls: this generation's log is where that is told.
    emit(k, rec, now, 'job.queued', '{"reason":"answered","decisions":' .. decisions .. '}')
    redis.call('HDEL', k.job, unpack(names))
  end
  redis.call('ZREM', k.root .. ':expiry', rec.tier .. ':unknown:' .. k.id)
  for n = 1, results do
    local call = args[i + 2 * n - 1]
    redis.call('HDEL', k.job, 'u:' .. call, 'm:' .. call)
  end
  return true
end

-- finish(root; id, fence, status, kind, data, error, undecided calls as 'n, call…', results…, events…): step 6. It
-- checks the fence, not the lease. Answers 'ok' or 'lost'; a repetition of what was written is 'ok'.
local function finish(keys, args)
  local k, now = keys_of(keys[1], args[1]), now_ms()
  local rec, other = held(k, args[2])
  local undecided = tonumber(args[7])
  local i = 8 + undecided
  if not rec then
    if not other or other.fence ~= tonumber(args[2]) or not TERMINAL[other.status] then return 'lost' end
    local settles = other.status == 'unknown' and (args[3] == 'completed' or args[3] == 'failed') and
                    settle_unknown(k, other, now, args, i)
    if not settles then return other.status == args[3] and 'ok' or 'lost' end
    rec = other
  end
  apply_changes(k, rec, now, args, i)
  for n = 1, undecided do redis.call('HSET', k.job, 'u:' .. args[7 + n], '1') end
  finish_record(k, rec, now, args[3], args[4], args[5], args[6])
  return 'ok'
end

-- retry(root; id, fence, delay_ms, error, results…, events…): step 8. hand_back: the same without a delay, and
-- neither a start nor a retry is counted. A cancel request wins. Answers 'ok', 'cancelled' or 'lost'.
local function leave(keys, args, counts_as_retry)
  local k, now = keys_of(keys[1], args[1]), now_ms()
  local rec, other = held(k, args[2], CLAIM_FIELDS)
  if not rec then
    local repeated = other and other.fence == tonumber(args[2]) and other.ended_by == other.fence
    if repeated then return other.status == 'cancelled' and 'cancelled' or other.status == 'queued' and 'ok' or 'lost' end
    return 'lost'
  end
  local i = apply_changes(k, rec, now, args, 5)
  if rec.cancel then
    -- Calls that are tried again have failed; those of a worker that leaves were told to stop.
    end_cancelled(k, rec, now, rec.cancel, counts_as_retry and 'ended' or 'told')
    return 'cancelled'
  end
  local delay = tonumber(args[3])
  if counts_as_retry then
    rec.retries = rec.retries + 1
    emit(k, rec, now, 'job.retrying', '{"error":' .. args[4] .. ',"retry":' .. rec.retries ..
         ',"next_attempt_at_ms":' .. (now + delay) .. '}')
    redis.call('HSET', k.job, 'error', args[4])
  else
    rec.starts = math.max(0, rec.starts - 1)
    emit(k, rec, now, 'job.queued', '{"tier":"' .. rec.tier .. '","reason":"handed_back"}')
  end
  wait_again(k, rec, now, now + delay, stop_clock(rec, now))
  redis.call('HSET', k.job, 'ended_by', rec.fence)
  return 'ok'
end

redis.register_function('{prefix}_mark_start', mark_start)
redis.register_function('{prefix}_withdraw_mark', withdraw_mark)
redis.register_function('{prefix}_progress', progress)
redis.register_function('{prefix}_renew', renew)
redis.register_function('{prefix}_finish', finish)
redis.register_function('{prefix}_retry', function(keys, args) return leave(keys, args, true) end)
redis.register_function('{prefix}_hand_back', function(keys, args) return leave(keys, args, false) end)
